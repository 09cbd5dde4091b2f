"""Pages of figures that are one file, need no network and no script: their look, their drawing and their writing."""
