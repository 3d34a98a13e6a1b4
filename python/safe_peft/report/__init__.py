"""Reports of a training: records, tables, figures and an HTML page."""
