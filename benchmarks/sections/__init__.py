"""What is measured, one module each: a function of the session that writes to its log."""
