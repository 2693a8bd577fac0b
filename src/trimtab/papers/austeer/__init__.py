"""AUSteer: which units, how many, and what each part is worth."""
