"""What keeps a run honest: ranks that wait in vain, ranks that did different things, values that are no numbers."""
