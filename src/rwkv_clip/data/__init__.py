"""Training data in files: what is read and written, record by record."""
