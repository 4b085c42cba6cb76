"""Pure numeric functions, one per file: reference first, then the fast forms."""
