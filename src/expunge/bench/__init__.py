"""The benchmark: grids of cells (suites), the runner that does each once, and tables and plots of what came of it."""
