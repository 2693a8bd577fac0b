"""What a steering gains and what it costs. One file a metric."""
