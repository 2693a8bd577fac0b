"""Rankings of units held against each other: by how often a sign agrees, and by effect."""
