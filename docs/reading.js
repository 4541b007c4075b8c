// Marks the current section in the navigation. Without scripts the page lacks this alone.
function mark() {
  const links = [...document.querySelectorAll("nav a")];
  const top = link => document.getElementById(link.hash.slice(1)).getBoundingClientRect().top;
  const now = links.findLast(link => top(link) < 140);
  links.forEach(link => { link.ariaCurrent = link === now ? "true" : null; });
  if (now) now.parentNode.scrollLeft = now.offsetLeft - 40;
}
addEventListener("scroll", mark, { passive: true });
mark();
