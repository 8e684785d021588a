"""`ringjax tune`: finds the fastest tiles of a GPU kernel on this machine."""
