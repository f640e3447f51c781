"""Training machinery that all trainers share; one duty a file."""
