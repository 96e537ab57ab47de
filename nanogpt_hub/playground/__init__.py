"""What the page does, without gradio."""
