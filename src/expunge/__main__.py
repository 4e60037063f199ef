"""`python -m expunge`, for launchers that start a module: torchrun, accelerate launch."""

from expunge.cli import main

main()
