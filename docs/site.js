// Names and keyboard access that the theme's scripts do not give to what they make.
const named = (selector, name, keys) => document.querySelectorAll(selector).forEach((element, number) => {
  if (!element.hasAttribute("aria-label")) element.setAttribute("aria-label", number ? `${name} ${number + 1}` : name);
  if (keys) Object.assign(element, {tabIndex: 0, role: "region"});
});
const mend = () => {
  named(".md-search", "Search");
  named(".md-code__nav", "Tools of code block");
  named(".md-typeset__scrollwrap", "Table", true);
  document.querySelectorAll("pre > code").forEach(code => code.scrollWidth > code.clientWidth && (code.tabIndex = 0));
};
addEventListener("load", mend);
new MutationObserver(mend).observe(document.documentElement, {childList: true, subtree: true});
