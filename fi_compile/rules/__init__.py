"""The certificate's table: how facts pass through operators, one file per family."""
