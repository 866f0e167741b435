"""Compares ways of training a target model without source data."""
