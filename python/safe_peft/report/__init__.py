"""What a training did: records, tables, figures and a page."""
