/** Dark or light: the system's choice until the person makes one. */

const KEY = "trapline.theme";
export type Theme = "dark" | "light";

class ThemeChoice {
  private readonly system = matchMedia("(prefers-color-scheme: light)");
  current = $state<Theme>("dark");

  constructor() {
    this.apply();
    this.system.addEventListener("change", () => this.apply());
  }

  toggle(): void {
    localStorage.setItem(KEY, this.current === "dark" ? "light" : "dark");
    this.apply();
  }

  private apply(): void {
    const chosen = localStorage.getItem(KEY);
    this.current = chosen === "dark" || chosen === "light" ? chosen : this.system.matches ? "light" : "dark";
    document.documentElement.dataset["theme"] = this.current;
  }
}

export const theme = new ThemeChoice();
