"""Pages: self-contained HTML files with tables and interactive charts."""
