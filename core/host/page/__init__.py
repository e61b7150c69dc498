"""What the pack tells the page: progress, openings, routes."""
