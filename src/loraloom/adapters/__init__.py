"""Methods: each file holds one method's weights and formula."""
