"""Task graphs: given or learned similarities of clients, and the step that pulls neighbours together."""
