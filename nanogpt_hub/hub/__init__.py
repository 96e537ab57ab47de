"""Models on the Hugging Face Hub: found and fetched (resolve), published (publish, background), described (card)."""
