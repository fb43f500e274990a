"""Words of English that a picture can show, as data files. words.py reads them."""
