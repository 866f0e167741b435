"""Labels a pool by geometry and measures what the labels are worth in transfer."""
