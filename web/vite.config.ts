import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

// Relative addresses, so that the dashboard also works behind a path prefix.
export default defineConfig({
  base: "./",
  plugins: [svelte()],
  build: {
    outDir: "../service/trapline_service/static",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0, // no data: addresses, so that a strict Content-Security-Policy holds
    modulePreload: { polyfill: false },
  },
  server: {
    proxy: { "/api": { target: process.env["TRAPLINE_URL"] ?? "http://127.0.0.1:8470", ws: true } },
  },
  test: { include: ["tests/**/*.test.ts"], environment: "node" },
});
