"""stub"""
class TerminalView:
    def __init__(self, recorder): pass
    def draw(self): pass
    def close(self): pass
