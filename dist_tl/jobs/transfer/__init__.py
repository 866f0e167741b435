"""Compare ways of getting a target model without source data."""
