"""From weights to use: an index of pictures, exact search in it, and its export to other engines."""
