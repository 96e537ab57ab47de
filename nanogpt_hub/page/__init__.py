"""The page: one file a tab. The only folder of the library that imports gradio.

    layout.py puts the tabs together and serves them       parts.py what several tabs use
    header.py which model is in use                        generate.py chat.py look.py training.py compare.py model.py:
                                                           the tabs

Each tab is a class. Its constructor builds its components and wires their events; `on_model` says what it does when
another model is in use.
"""
