"""What a saved adapter has learnt: read from its folder, measured, drawn and told in plain sentences."""
