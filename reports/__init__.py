"""Reports: tables, statistics, plots and a page, read from run folders. Trains nothing and imports no torch."""
