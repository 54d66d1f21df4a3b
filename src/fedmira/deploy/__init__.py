"""A real federation: a server and sites in separate places. The rounds, the gate and the methods are the engine's."""
