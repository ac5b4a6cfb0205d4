"""What a run file may say: frozen pydantic models, and the reader that makes them."""
