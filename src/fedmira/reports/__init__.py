"""Reports on a study, from its folders only: statistics over clients, the HTML report, the terminal's tables."""
