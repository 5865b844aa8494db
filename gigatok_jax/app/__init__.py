"""`gigatok app`: tokenizers and generators in a browser page, with Gradio (the extra `app`)."""
