"""Training data as they are: tables, webdataset tars, Parquet files and `datasets` folders, read at any place."""
