"""What a study says, read from its folders only: statistics over clients, the HTML report, the terminal's table."""
