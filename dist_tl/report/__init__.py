"""What a finished run looks like to people: a table, a verdict, one page that opens offline."""
