"""What evolved masking costs, what its shortcut spares, and what its masks look like: one command each."""
