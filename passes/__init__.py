"""Generic walkers over programs, one per file; they name no operator and no mixer."""
