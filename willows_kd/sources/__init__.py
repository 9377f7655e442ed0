"""Where text comes from: files, tables, chats, the book's download, a model that writes."""
