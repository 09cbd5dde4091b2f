"""Everything that knows optimisers and trainers: when a method's rules run, and on what."""
