"""Files to token ids: `formats` reads examples, `partition` forms clients of them, `batches` encodes and stacks."""
