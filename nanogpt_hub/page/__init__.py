"""The page: one file a tab. The only folder of the library that imports gradio."""
