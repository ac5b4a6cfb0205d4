"""VeRA: frozen random A and B that all projections share, and two trained vectors on each."""
