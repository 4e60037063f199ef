"""What a terminal shows: progress while a command runs, and its answer. Nothing here imports torch."""
