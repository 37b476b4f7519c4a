"""How fast a structured layer is beside other ways to compute the same.  Nothing here is imported by the library."""
