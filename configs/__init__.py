"""One run per file. Each builds a locked ConfigDict; they import ml_collections only."""
