"""Reports: tables, pictures and page of a run, and of several runs together."""
