"""The report as one HTML page: it opens from disk, loads nothing, and every text in it stays text.

The trade-off plot, the table of runs and the charts of a run are drawn by the page's own script: a plotting library
would be as large as the rest of the page, and its points would not be links that can be reached by keyboard.
"""

from reports.render.page.page import Section, write_page

__all__ = ["Section", "write_page"]
