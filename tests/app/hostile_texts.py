"""Names, questions and answers that would do harm where a page took them for more than text."""

HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'>",
    "' onmouseover='document.title=1",
    "</title></style></pre><h1>faked",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "$title ${body} {question} %s",
    "javascript:document.title='owned'",
    "\x1b[31m\x00\u202egnp.exe\ud800",
    "http://example.org/a.png<!-- --><![CDATA[",
)
