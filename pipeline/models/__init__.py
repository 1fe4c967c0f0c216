"""Networks: finding, loading, hashing and saving them."""
